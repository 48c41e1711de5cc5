package config

import (
	"errors"
	"io/fs"
	"syscall"
)

// Permanent marks an error that no restart of the program mends: an operator has to change
// something first. The exit status tells service managers. It returns nil for nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return permanentError{err}
}

type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// Permanent implements the interface that [IsPermanent] looks for.
func (e permanentError) Permanent() bool { return true }

// IsPermanent reports whether an error in err's tree has a method Permanent that returns
// true, such as an [Error] or one that [Permanent] has marked.
func IsPermanent(err error) bool {
	marked, ok := errors.AsType[interface {
		error
		Permanent() bool
	}](err)
	return ok && marked.Permanent()
}

// FileError marks the error of using a file as [Permanent] if the file has the wrong
// content, kind, owner or mode. A file that is missing may be put in place a moment later,
// and a disk may have space again, so those errors are returned as they are.
func FileError(err error) error {
	var number syscall.Errno
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return err
	case !errors.As(err, &number):
		return Permanent(err) // of the content
	}
	switch number {
	case syscall.EACCES, syscall.EPERM, syscall.EISDIR, syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL, syscall.ENXIO:
		return Permanent(err)
	}
	return err
}
