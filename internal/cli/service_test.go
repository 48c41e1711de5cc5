package cli_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/renewd/renewd/internal/cli"
)

// stream returns a file and an environment whose JOURNAL_STREAM identifies it.
func stream(t *testing.T) (*os.File, func(string) string) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	id := fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
	return f, func(name string) string { return map[string]string{"JOURNAL_STREAM": id}[name] }
}

func written(t *testing.T, f *os.File) []string {
	t.Helper()
	data, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

func TestJournalPriorities(t *testing.T) {
	t.Parallel()
	for format, start := range map[string]string{"json": `{"time":`, "text": ""} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			f, getenv := stream(t)
			log := cli.NewLog(f, slog.LevelDebug, format, getenv).With("a", 1).WithGroup("g")
			log.Debug("debugged")
			log.Info("informed")
			log.Warn("warned")
			log.Error("failed")
			lines := written(t, f)
			want := []string{"<7> debugged", "<6> informed", "<4> warned", "<3> failed"}
			if len(lines) != len(want) {
				t.Fatalf("%d lines: %q", len(lines), lines)
			}
			for i, line := range lines {
				priority, message, _ := strings.Cut(want[i], " ")
				if !strings.HasPrefix(line, priority+start) || !strings.Contains(line, message) {
					t.Errorf("%q, want priority %s and %q", line, priority, message)
				}
			}
		})
	}
}

// TestNoJournal: lines to a file have no priority.
func TestNoJournal(t *testing.T) {
	t.Parallel()
	_, journal := stream(t)
	other, _ := stream(t)
	for name, getenv := range map[string]func(string) string{"none": noEnv, "redirected": journal} {
		cli.NewLog(other, slog.LevelInfo, "json", getenv).Error("failed")
		if line := written(t, other)[0]; !strings.HasPrefix(line, "{") {
			t.Errorf("%s: %q", name, line)
		}
	}
}

func TestReportToJournal(t *testing.T) {
	t.Parallel()
	f, getenv := stream(t)
	if code := cli.Report("server", errors.New("broken\nin two lines"), cli.Env{Getenv: getenv, Stderr: f}); code != cli.ExitFailed {
		t.Errorf("status %d", code)
	}
	if got := strings.Join(written(t, f), "|"); got != "<3>server: broken|<3>in two lines" {
		t.Errorf("%q", got)
	}
}

func TestStarted(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	getenv := func(name string) string { return map[string]string{"NOTIFY_SOCKET": path}[name] }

	var b strings.Builder
	log := cli.NewLog(&b, slog.LevelInfo, "text", noEnv)
	cli.Started(noEnv, log)()
	cli.Started(getenv, log)()
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" || b.Len() > 0 {
		t.Errorf("%q, %v; logged: %s", buf[:n], err, &b)
	}

	_ = conn.Close() // without a listener: logged, and the daemon continues
	cli.Started(getenv, log)()
	if !strings.Contains(b.String(), "NOTIFY_SOCKET") {
		t.Errorf("logged: %q", b.String())
	}
}
