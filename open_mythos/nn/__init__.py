"""The layers, on torch alone. Start with `recurrent` (the loop), `injection` and `halting`."""
