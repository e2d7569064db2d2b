"""What can be done with a run: the STAGES table (steps.py), and a module for each verb."""
