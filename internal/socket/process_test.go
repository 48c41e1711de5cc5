package socket

import (
	"bufio"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestMain runs the tests or, if RENEWD_TEST_SOCKET is set, listens on that socket until
// standard input ends.
func TestMain(m *testing.M) {
	path := os.Getenv("RENEWD_TEST_SOCKET")
	if path == "" {
		os.Exit(m.Run())
	}
	lis, err := Listen(path, 0o777)
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() { defer conn.Close(); _, _ = bufio.NewReader(conn).WriteTo(conn) }()
		}
	}()
	os.Stdout.WriteString("listening\n")
	os.Stdin.Read(make([]byte, 1))
	lis.Close()
}

// listenElsewhere starts another process that listens on the path until free is called.
func listenElsewhere(t *testing.T, path string) (free func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "RENEWD_TEST_SOCKET="+path)
	cmd.WaitDelay = time.Minute
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("the other process does not listen: %v", err)
	}
	return func() { stdin.Close(); cmd.Wait() }
}
