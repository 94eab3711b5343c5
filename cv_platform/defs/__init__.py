"""All the Dagster code of the platform; what an asset does lives in the domain folder of the same name."""
