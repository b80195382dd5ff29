"""From a typed pipeline to a rewritten program: manager, instruments, bisection, reproducers."""
