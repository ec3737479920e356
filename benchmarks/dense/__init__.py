"""Quantizers behind one interface: each gives dense weights, for `real.py` to put into one model and to measure alike.

A maker's module has

    missing()              what keeps it from running here, None if nothing does
    versions()             what a report has to name
    make(job, options)     yields a `Made` for each precision; `options` are those of the entry, and it takes out of
                           them what it knows

and loads its library only inside these, so that the others run without it.
"""
