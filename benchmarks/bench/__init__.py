"""`hypersd-bench`: is it right, is it good, how fast, how big, against what. Importing this package imports nothing."""
