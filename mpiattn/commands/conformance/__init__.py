"""`mpiattn conformance`: an implementation of attention, also a foreign one, against the oracle and the formulas."""
