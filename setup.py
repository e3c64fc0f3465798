from setuptools import setup


setup()  # All metadata lives in setup.cfg.
