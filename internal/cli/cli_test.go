package cli_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
)

// TestReport: the error of a command determines the exit status and the text.
func TestReport(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		err  error
		code int
		want string
	}{
		{"success", nil, cli.ExitOK, ""},
		{"help", fmt.Errorf("parse: %w", flag.ErrHelp), cli.ExitOK, ""},
		{"failure", errors.New("no answer"), cli.ExitFailed, "prog: no answer\n"},
		{"permanent", fmt.Errorf("start: %w", config.Permanent(errors.New("wrong owner"))), cli.ExitPermanent, "prog: start: wrong owner\n"},
		{"usage", fmt.Errorf("run: %w", cli.Usagef("no flag %q", "-x")), cli.ExitPermanent, "prog: no flag \"-x\"\nRun \"prog help\" for the usage.\n"},
		{"control sequence", errors.New("answer \x1b[2J\u009b2J\r\nin\ttwo lines"), cli.ExitFailed, "prog: answer \uFFFD[2J\uFFFD2J\uFFFD\nin\ttwo lines\n"},
		{"configuration", fmt.Errorf("run: %w", config.Error{{Where: "f:1", Path: "a", What: "is wrong"}, {What: "x"}}), cli.ExitPermanent, "f:1: a is wrong\nx\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			code := cli.Report("prog", tt.err, cli.Env{Stdout: &stdout, Stderr: &stderr})
			if code != tt.code || stderr.String() != tt.want || stdout.Len() > 0 {
				t.Errorf("exit %d, stderr %q, stdout %q", code, stderr.String(), stdout.String())
			}
		})
	}
}

func TestWhen(t *testing.T) {
	t.Parallel()
	now := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		0:             "2020-01-02 03:04:05 UTC (now)",
		-time.Minute:  "2020-01-02 03:03:05 UTC (1m ago)",
		2 * time.Hour: "2020-01-02 05:04:05 UTC (in 2h)",
	} {
		if got := cli.When(now.Add(d).In(time.FixedZone("x", 3600)), now); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
