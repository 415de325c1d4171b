"""Which part lives on which device and in which type; the only place that names devices."""
