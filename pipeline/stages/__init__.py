"""What one worker does of each stage. No Ray, no scheduling, no events: those are the driver's."""
