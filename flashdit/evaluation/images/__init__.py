"""Where scored images come from: npz files, folders, generators."""
