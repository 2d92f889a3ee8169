"""How the bytes of a switch travel: a move, the transports that carry it, their memory, and streams beside compute."""
