"""The gallery: one module a method, whose `figure(folder)` runs it and draws what it finds."""
