"""`python -m deploy.demo`: the same as `silotune demo`."""

from deploy.demo.cli import demo

if __name__ == "__main__":
    demo()
