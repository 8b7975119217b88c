"""Child processes, watched and signalled through pidfds. (Contract; implementation follows.)"""
