"""What a phase would cost on chips that are not there: memory, arithmetic, communication, time."""
