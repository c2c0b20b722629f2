"""Video models that use Monarch attention."""

if __name__ == "models":  # imported by the folder's name, which is possible in a checkout only
    from monarchrt.checkout import same_as_in_monarchrt

    same_as_in_monarchrt(__name__)
