"""How much is taken in: by caller, by account that signs in, and by the process as a whole."""
