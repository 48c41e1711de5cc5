package main

import "flag"

// configCommand is "config check".
func configCommand(args []string, e env) error {
	if len(args) == 0 || args[0] != "check" {
		return usagef("config: the one subcommand is check")
	}
	fset := flag.NewFlagSet("config check", flag.ContinueOnError)
	loadConfig := configFlags(fset, e.getenv)
	if err := parseFlags(fset, args[1:], checkUsage+"\n"+fieldTable(), e); err != nil {
		return err
	}
	if fset.Lookup("config").Value.String() == "" {
		return usagef("config check: give the file with -config")
	}
	if _, err := loadConfig(); err != nil {
		return err
	}
	return printf(e.stdout, "%s: ok\n", fset.Lookup("config").Value)
}
