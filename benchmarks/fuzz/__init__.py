"""Fuzzing of the readers: small valid files, changed at random, through the conversion in a confined process.

Whatever a file has become, it is read, or it is refused by an error that says what is wrong with it. All else is a
finding: another exception, a crash, a file that takes longer than its clock.
"""
