"""The colcon package d4_datasets: what the robot's process needs; all else installs it with pip."""

from setuptools import setup

setup(
    name="d4_datasets",
    version="0.1.0",
    description="Contracts, field paths, pictures and time alignment of d4",
    license="Apache-2.0",
    packages=["d4_datasets"],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/d4_datasets"]),
        ("share/d4_datasets", ["package.xml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
)
