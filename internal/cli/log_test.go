package cli_test

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/cli"
)

// TestLogFormat: every combination of output, format and NO_COLOR.
func TestLogFormat(t *testing.T) {
	t.Parallel()
	const color = "\x1b["
	for _, tt := range []struct {
		format, noColor string
		terminal        bool
		json, color     bool
	}{
		{format: "auto", terminal: true, color: true},
		{format: "auto", terminal: true, noColor: "1"},
		{format: "auto", json: true},
		{format: "text"},
		{format: "text", terminal: true, color: true},
		{format: "json", terminal: true, json: true},
	} {
		t.Run(fmt.Sprintf("%s terminal=%v NO_COLOR=%q", tt.format, tt.terminal, tt.noColor), func(t *testing.T) {
			t.Parallel()
			getenv := func(string) string { return tt.noColor }
			var line string
			if tt.terminal {
				master, slave := openTerminal(t)
				cli.NewLog(slave, slog.LevelInfo, tt.format, getenv).Info("bundle refreshed", "sequence", 7)
				var err error
				if line, err = bufio.NewReader(master).ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			} else {
				var b bytes.Buffer
				cli.NewLog(&b, slog.LevelInfo, tt.format, getenv).Info("bundle refreshed", "sequence", 7)
				line = b.String()
			}
			if got := strings.HasPrefix(line, "{"); got != tt.json {
				t.Errorf("JSON = %v: %q", got, line)
			}
			if got := strings.Contains(line, color); got != tt.color {
				t.Errorf("color = %v: %q", got, line)
			}
			if !strings.Contains(line, "bundle refreshed") {
				t.Errorf("no message: %q", line)
			}
		})
	}
}

// TestLogDuration: both formats write a duration with its unit.
func TestLogDuration(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{"text": "delay=1.5s", "json": `"delay":"1.5s"`} {
		var b bytes.Buffer
		cli.NewLog(&b, slog.LevelInfo, format, noEnv).Info("call delayed", "delay", 1500*time.Millisecond)
		if got := b.String(); !strings.Contains(got, want) {
			t.Errorf("%s: no %s in %q", format, want, got)
		}
	}
}

func TestLogLevel(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		var b bytes.Buffer
		log := cli.NewLog(&b, slog.LevelWarn, format, noEnv)
		log.Info("below")
		log.Warn("above")
		if got := b.String(); strings.Contains(got, "below") || !strings.Contains(got, "above") {
			t.Errorf("%s at warn: %q", format, got)
		}
	}
}

// openTerminal opens a pseudo-terminal (pty(7)).
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close() })
	return master, slave
}

func noEnv(string) string { return "" }
