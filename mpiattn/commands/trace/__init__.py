"""`mpiattn trace`: what a file of events says, as text and as a picture."""
