"""What AnyIO lacks: a clock and one-shots that cost nothing, one timer for all deadlines, one error
out of a task group, and the like. It knows nothing of the package.
"""
