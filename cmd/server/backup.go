package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

// backupTimeout is how long a backup may take. It is longer than the server's own limit,
// so that the server's error is printed.
const backupTimeout = 130 * time.Second

// standardOutput is the file name that stands for standard output.
const standardOutput = "-"

// backup is a backup in progress.
type backup struct {
	*client
	file     string // or standardOutput
	force    bool
	keyFile  string // of the server; empty: the keys are not decrypted
	progress *runbook.Screen
}

// shownBackup is a backup as -o json prints it.
type shownBackup struct {
	File        string              `json:"file"`
	Size        int64               `json:"size_bytes"`
	TakenAt     time.Time           `json:"taken_at"`
	TrustDomain string              `json:"trust_domain"`
	Deployments []shownBackupOfPart `json:"deployments"`
	// KeysChecked is set if all signing keys were decrypted.
	KeysChecked bool `json:"keys_checked"`
}

type shownBackupOfPart struct {
	Name    string `json:"name"`
	Keysets int    `json:"keysets"`
	Entries int    `json:"entries"`
	Agents  int    `json:"agents"`
}

// backupCommand is "backup".
func backupCommand(ctx context.Context, call *cli.Call) error {
	b := backup{client: newClient(call), progress: &runbook.Screen{W: call.Stderr}}
	b.timeout = backupTimeout
	b.Flags.BoolVar(&b.force, "force", false, "")
	b.Flags.StringVar(&b.keyFile, "key-file", "", "")
	file, err := b.Parse("file")
	if err != nil {
		return err
	}
	b.file = file[0]
	if b.file == standardOutput && cli.IsTerminal(b.Stdout) {
		return cli.Usagef("%s: FILE: %s is standard output, which is a terminal: redirect it to a file or a pipe, or give the name of a file", b.Name(), b.file)
	}
	shown, err := b.make(ctx)
	if err != nil {
		return err
	}
	results := b.Stdout
	if b.file == standardOutput {
		results = b.Stderr
	}
	if b.JSON() {
		return cli.PrintJSON(results, shown)
	}
	return printBackup(results, shown)
}

// make writes the backup to a temporary file. When that is durable and checked, it is
// renamed, or written to standard output.
func (b *backup) make(ctx context.Context) (shown shownBackup, err error) {
	failed := func(err error) (shownBackup, error) {
		return shownBackup{}, fmt.Errorf("%s: %w", b.Name(), err)
	}
	var key seal.Manager
	if b.keyFile != "" {
		if key, err = seal.File(b.keyFile); err != nil {
			return failed(err)
		}
	}
	f, err := b.create()
	if err != nil {
		return failed(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var td spiffeid.TrustDomain
	err = b.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ListDeployments(ctx, &api.ListDeploymentsRequest{TrustDomain: b.trustDomain})
		if err == nil {
			td, err = spiffeid.TrustDomainFromString(resp.GetTrustDomain())
		}
		if err != nil {
			return err
		}
		return b.receive(ctx, o, f)
	})
	if err != nil {
		return shownBackup{}, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return failed(err)
	}
	sum, err := store.Inspect(ctx, f.Name(), store.Options{TrustDomain: td, Seal: key})
	if err != nil {
		return failed(fmt.Errorf("copy rejected and deleted: %w", err))
	}
	if sum.CopiedAt.IsZero() {
		return failed(errors.New("copy rejected and deleted: it is not marked as a copy, so that a server would not detect its restore"))
	}
	if b.file == standardOutput {
		err = b.copyOut(f.Name())
	} else {
		err = b.place(f.Name())
	}
	if err != nil {
		return failed(err)
	}
	b.progress.Clear()
	shown = shownBackup{File: b.file, Size: sum.Size, TakenAt: sum.CopiedAt, TrustDomain: td.Name(), KeysChecked: key != nil}
	for _, d := range sum.Deployments {
		shown.Deployments = append(shown.Deployments, shownBackupOfPart(d))
	}
	return shown, nil
}

// create creates the temporary file, with mode 0600.
func (b *backup) create() (*os.File, error) {
	folder, pattern := os.TempDir(), "renewd-backup-*.db"
	if b.file != standardOutput {
		if err := b.checkReplaceable(); err != nil {
			return nil, err
		}
		folder, pattern = filepath.Dir(b.file), "."+filepath.Base(b.file)+".*"
	}
	f, err := os.CreateTemp(folder, pattern)
	if err != nil && b.file == standardOutput {
		return nil, fmt.Errorf("TMPDIR: %w: the copy is checked there before it is written to standard output; set TMPDIR to a folder with room for it", err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: the folder must exist, and you must be able to write to it", err)
	}
	return f, nil
}

// checkReplaceable checks that no file is overwritten, unless it is an older backup and
// --force is given. The rename would replace a device, and a link such as /dev/stdout,
// instead of writing to it.
func (b *backup) checkReplaceable() error {
	info, err := os.Lstat(b.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("FILE: %s is %s, not a regular file: give the name of a new file, or - for standard output", b.file, describe(info.Mode()))
	case !b.force:
		return fmt.Errorf("%s exists and is not replaced: choose another name, or overwrite it with --force", b.file)
	}
	return checkOlderBackup(b.file)
}

// storeMagic is the number at byte 16 of a store, in the byte order of the machine.
const storeMagic = 0xED0CDAED

// checkOlderBackup checks that a file is empty, or a store that no program has open. Without
// the store in data_dir a running server would lose at its stop all that changed since,
// and other files, such as the encryption key, may exist only once.
func checkOlderBackup(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("FILE: %s is the store of a running server, which a backup must not replace: give the name of another file", file)
	}
	var header [20]byte
	n, err := io.ReadFull(f, header[:])
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case n < len(header) || binary.NativeEndian.Uint32(header[16:]) != storeMagic:
		return fmt.Errorf("FILE: %s is not a backup, and --force replaces nothing else: give the name of another file, or delete this one first", file)
	}
	return nil
}

// describe names the type of a file that is not a regular one.
func describe(mode fs.FileMode) string {
	for _, t := range []struct {
		bits fs.FileMode
		name string
	}{
		{fs.ModeDir, "a directory"}, {fs.ModeSymlink, "a symbolic link"}, {fs.ModeNamedPipe, "a FIFO"}, {fs.ModeSocket, "a socket"},
		{fs.ModeDevice | fs.ModeCharDevice, "a device"},
	} {
		if mode&t.bits != 0 {
			return t.name
		}
	}
	return "of another type"
}

// copyOut writes the checked copy to standard output.
func (b *backup) copyOut(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(b.Stdout, f); err != nil {
		return fmt.Errorf("write standard output: %w", err)
	}
	return nil
}

// receive writes the server's copy to w.
func (b *backup) receive(ctx context.Context, o api.OperatorClient, w io.Writer) error {
	begin, got := time.Now(), int64(0)
	stream, err := o.Backup(ctx, &api.BackupRequest{})
	if err != nil {
		return err
	}
	for size := int64(0); ; {
		part, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && (size == 0 || size != got):
			return fmt.Errorf("the copy is incomplete after %d bytes", got)
		case errors.Is(err, io.EOF):
			return nil
		case status.Code(err) == codes.DeadlineExceeded:
			return fmt.Errorf("the copy is incomplete after %v and %s: run the backup on the server's machine, over the admin socket, and copy the file from there",
				time.Since(begin).Round(time.Second), amount(got))
		case err != nil:
			return err
		}
		if _, err := w.Write(part.GetData()); err != nil {
			return err
		}
		got, size = got+int64(len(part.GetData())), part.GetSize()
		if now := time.Now(); now.Sub(begin) > time.Second {
			b.progress.Progress("received", amount(got)+" received", now)
		}
	}
}

// place renames a file to its final name, durably.
func (b *backup) place(temp string) error {
	// A link never replaces a file, unlike a rename, but not every file system has links.
	if b.force || os.Link(temp, b.file) != nil {
		if err := b.checkReplaceable(); err != nil {
			return err
		}
		if err := os.Rename(temp, b.file); err != nil {
			return err
		}
	}
	d, err := os.Open(filepath.Dir(b.file))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func printBackup(w io.Writer, s shownBackup) error {
	table := cli.NewTable(w)
	_, _ = fmt.Fprintf(table, "FILE\tTAKEN AT\tSIZE\tTRUST DOMAIN\tDEPLOYMENTS\tKEYSETS\tENTRIES\tAGENTS\tKEYS\n")
	var names []string
	var sum shownBackupOfPart
	for _, d := range s.Deployments {
		names = append(names, d.Name)
		sum.Keysets, sum.Entries, sum.Agents = sum.Keysets+d.Keysets, sum.Entries+d.Entries, sum.Agents+d.Agents
	}
	keys := "not checked"
	if s.KeysChecked {
		keys = "checked"
	}
	_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", text(s.File), clock.Text(s.TakenAt), amount(s.Size),
		text(s.TrustDomain), text(strings.Join(names, " ")), sum.Keysets, sum.Entries, sum.Agents, keys)
	return cli.Flush(table)
}

// amount formats a number of bytes.
func amount(bytes int64) string {
	if bytes < 1<<20 {
		return fmt.Sprintf("%d KiB", (bytes+1<<10-1)>>10)
	}
	return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
}
