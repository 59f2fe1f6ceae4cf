"""One command for the first hour on a GPU: is it right, is it fast, does it serve."""
