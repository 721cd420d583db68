"""The Python-backend models of the server: each entry's model.py names one class of this package."""
