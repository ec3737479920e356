"""Other libraries' low-bit products on CPUs, behind one interface, for cpu_peers.py and model_peers.py.

Each peer module has

    missing()                what keeps it from running here, None if nothing does
    versions()               what a report has to name
    contenders(problem)      its products of one shape, ready to be checked and timed

and loads its library only inside these, so that the others run without it.
"""
