package cli_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
)

var errBroken = config.Permanent(errors.New("broken for good"))

// newProgram returns a program whose commands print their flags and arguments.
func newProgram() *cli.Program {
	show := func(_ context.Context, c *cli.Call) error {
		on := c.Flags.Bool("on", false, "")
		c.Flags.Int("size", 0, "")
		c.Output()
		args, err := c.Parse("file")
		if err != nil {
			return err
		}
		return cli.Printf(c.Stdout, "%s %v on=%v json=%v\n", c.Name(), args, *on, c.JSON())
	}
	fail := func(context.Context, *cli.Call) error { return errBroken }
	return &cli.Program{
		Name: "prog", Version: "v1", Usage: "the usage\n",
		Commands: []cli.Command{
			{Name: "show", Help: cli.Text("help of show\n"), Run: show},
			{Name: "fail", Help: cli.Text("help of fail\n"), Run: fail},
			{Name: "group", Help: cli.Text("help of group\n"), Sub: []cli.Command{{Name: "show", Run: show}, {Name: "fail", Run: fail}}},
			{Name: "one", Help: cli.Text("help of one\n"), Sub: []cli.Command{{Name: "show", Run: show}}},
		},
	}
}

func TestProgram(t *testing.T) {
	t.Parallel()
	const usage = "\nRun \"prog help\" for the usage.\n"
	for line, want := range map[string]struct {
		code           int
		stdout, stderr string
	}{
		"show f":              {0, "show [f] on=false json=false\n", ""},
		"show -on f -o json":  {0, "show [f] on=true json=true\n", ""},
		"group show f --on":   {0, "group show [f] on=true json=false\n", ""},
		"fail":                {2, "", "prog: broken for good\n"},
		"version":             {0, "renewd prog v1\n", ""},
		"--version":           {0, "renewd prog v1\n", ""},
		"help":                {0, "the usage\n", ""},
		"-h":                  {0, "the usage\n", ""},
		"help show":           {0, "help of show\n", ""},
		"help group fail":     {0, "help of group\n", ""},
		"show -h":             {0, "help of show\n", ""},
		"group -help":         {0, "help of group\n", ""},
		"group show f --help": {0, "help of group\n", ""},
		"":                    {2, "", "prog: no command" + usage},
		"other":               {2, "", "prog: unknown command \"other\"" + usage},
		"help other":          {2, "", "prog: no help for \"other\"" + usage},
		"group":               {2, "", "prog: group: say what to do: show or fail" + usage},
		"one":                 {2, "", "prog: one: say what to do: show" + usage},
		"group other":         {2, "", "prog: group: unknown subcommand \"other\": use show or fail" + usage},
		"show":                {2, "", "prog: show: give the file" + usage},
		"show f g":            {2, "", "prog: show: unexpected argument \"g\"" + usage},
		"show f -o yaml":      {2, "", "prog: show: -o takes text or json, not \"yaml\"" + usage},
		"group show f -no":    {2, "", "prog: group show: flag provided but not defined: --no" + usage},
		"show -n":             {2, "", "prog: show: flag provided but not defined: -n" + usage},
		"show -on=x":          {2, "", "prog: show: invalid boolean value \"x\" for --on: parse error" + usage},
		"show f -o":           {2, "", "prog: show: flag needs an argument: -o" + usage},
		"show -size -on":      {2, "", "prog: show: invalid value \"-on\" for flag --size: parse error" + usage},
		"show f -size":        {2, "", "prog: show: flag needs an argument: --size" + usage},
	} {
		var stdout, stderr bytes.Buffer
		code := newProgram().Run(t.Context(), strings.Fields(line), cli.Env{Getenv: noEnv, Stdout: &stdout, Stderr: &stderr})
		if code != want.code || stdout.String() != want.stdout || stderr.String() != want.stderr {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", line, code, &stdout, &stderr)
		}
	}
}

// TestOutputError: a write to a closed pipe is a failure.
func TestOutputError(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	defer func() { _ = w.Close() }()
	for _, line := range []string{"version", "help", "show f", "show -h"} {
		var stderr bytes.Buffer
		code := newProgram().Run(t.Context(), strings.Fields(line), cli.Env{Getenv: noEnv, Stdout: w, Stderr: &stderr})
		if code != cli.ExitFailed {
			t.Errorf("%s: exit %d, stderr %q", line, code, &stderr)
		}
	}
}
