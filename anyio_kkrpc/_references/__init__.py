"""Objects that are passed by reference: who was given what, and who holds it."""
