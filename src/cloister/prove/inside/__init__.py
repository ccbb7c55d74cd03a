"""What runs inside the sandbox: a driver, and the words cases are written in. Shipped as text, never imported by the host."""
