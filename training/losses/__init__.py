"""One loss a file, each as a function and a module."""
