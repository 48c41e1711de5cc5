package config_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/renewd/renewd/internal/config"
)

// TestFileError: what an operator has to change is permanent, what may be there or work a
// moment later is not.
func TestFileError(t *testing.T) {
	t.Parallel()
	errContent := errors.New("no certificate in it")
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{errContent, true},
		{fmt.Errorf("read it: %w", &fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES}), true},
		{syscall.EISDIR, true},
		{syscall.ENOTDIR, true},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, false},
		{fs.ErrNotExist, false},
		{syscall.ENOSPC, false},
		{syscall.EROFS, false},
		{syscall.EIO, false},
		{syscall.EMFILE, false},
	} {
		err := config.FileError(tt.err)
		if config.IsPermanent(err) != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%v: permanent %v, want %v", tt.err, !tt.want, tt.want)
		}
		if tt.err != nil && err.Error() != tt.err.Error() {
			t.Errorf("%v became %v", tt.err, err)
		}
	}
	if config.Permanent(nil) != nil || config.IsPermanent(errContent) || !config.IsPermanent(fmt.Errorf("start: %w", errors.Join(errContent, config.Error{{What: "x"}}))) {
		t.Error("nil, an unmarked error or a configuration is judged wrongly")
	}
}

// TestReadFile: what is not a file that can be read is named with the remedy.
func TestReadFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := config.ReadFile(file, 5); err != nil || string(data) != "12345" {
		t.Errorf("%q %v", data, err)
	}
	for _, tt := range []struct {
		path, want string
		permanent  bool
	}{
		{file, file + " is larger than 4 bytes: give another file", true},
		{dir, dir + " is a directory: give a file", true},
		{filepath.Join(dir, "none"), "open " + filepath.Join(dir, "none") + ": no such file or directory", false},
		{filepath.Join(file, "below"), "open " + filepath.Join(file, "below") + ": not a directory", true},
	} {
		_, err := config.ReadFile(tt.path, 4)
		if err == nil || err.Error() != tt.want || config.IsPermanent(err) != tt.permanent {
			t.Errorf("got  %v, permanent %v\nwant %s", err, config.IsPermanent(err), tt.want)
		}
	}
}
