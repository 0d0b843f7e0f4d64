"""What `d4-audit` looks for, one module per subject.

A subject takes in the episodes of a dataset one by one (`add`), turns what it counted into plain data
(`table`) and judges it (`verdicts`). None of them keeps anything that grows with the number of frames.
"""
