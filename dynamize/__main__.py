"""`python -m dynamize`, and `accelerate launch -m dynamize run ...` for several processes."""

from dynamize.cli import main

if __name__ == "__main__":
    main()
