"""What a run will take, before it is begun: bytes held, bytes sent, and where a step's time goes."""
