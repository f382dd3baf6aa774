"""The command line: each verb a thin call of one public function with the same name."""
