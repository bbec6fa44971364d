"""How the embedded model and the texts get onto this machine."""
