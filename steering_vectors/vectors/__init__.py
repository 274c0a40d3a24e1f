"""`SteeringVector`, and the files it is kept in."""
