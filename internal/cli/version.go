package cli

import (
	"context"
	"crypto/fips140"
	"io"
	"runtime"
	"runtime/debug"
)

// Build says what a program was made of. Its JSON form is what "version -o json" prints.
type Build struct {
	Program string `json:"program"`
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"` // of the sources; "-dirty" is appended if they had changes
	Go      string `json:"go"`
	FIPS    bool   `json:"fips"` // the Go cryptographic module runs in FIPS 140-3 mode
}

// ReadBuild returns what the Go tool recorded of a program; linked is the linker's
// version, or empty.
func ReadBuild(program, linked string) Build {
	b := Build{Program: program, Version: Version(linked), Go: runtime.Version(), FIPS: fips140.Enabled()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	settings := make(map[string]string, len(info.Settings))
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if b.Commit = settings["vcs.revision"]; b.Commit != "" && settings["vcs.modified"] == "true" {
		b.Commit += "-dirty"
	}
	return b
}

// Print writes b as one line of text, or as JSON when output is "json".
func (b Build) Print(w io.Writer, output string) error {
	if output == "json" {
		return PrintJSON(w, b)
	}
	return Printf(w, "renewd %s %s\n", b.Program, b.Version)
}

// version is the command version.
func (p *Program) version() Command {
	return Command{
		Name: "version",
		Help: Text("Usage: " + p.Name + ` version [-o text|json]

Prints the version. JSON also has the commit, the version of Go, and whether the
program runs in FIPS 140-3 mode.
`),
		Run: func(_ context.Context, c *Call) error {
			c.Output()
			if _, err := c.Parse(); err != nil {
				return err
			}
			return ReadBuild(p.Name, p.Version).Print(c.Stdout, c.output)
		},
	}
}

// Version returns the linker's version, otherwise the one that the Go tool recorded.
func Version(linked string) string {
	if linked != "" {
		return linked
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}
