"""What is done with runs beside training: plans of their cost; tests, maps, exports and mergers of their networks."""
