"""The science of Moeforge, one folder a stage. Nothing below this line knows Prefect or DVC."""
