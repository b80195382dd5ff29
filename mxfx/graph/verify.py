class VerifyError(ValueError): pass
def verify(program, touched=None): return 0
