"""The api process: `app.py` puts the rooms together, `state.py` opens what they share."""
