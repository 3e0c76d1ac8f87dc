"""How the guest will be reached at its resume, told while it sleeps."""
