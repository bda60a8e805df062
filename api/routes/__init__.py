"""The endpoints: a module per subject, each with its router and the bodies it takes and returns."""
