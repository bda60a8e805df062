"""The order desk: batches what arrives, starts the sagas, and learns what became of the orders."""
