"""What runs inside the sandbox: a driver, and the words cases are written in. Sent as text, never imported."""
