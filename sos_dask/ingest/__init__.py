"""Survey files -> canonical observations; repeats and conflicts of keys; what a file looks like.

Nothing is lost: a value that cannot be is null and counted, and a row without a usable key or
position is in ``rejected`` with its reason.
"""
