// Package fault defines the one error type that crosses Quarry's rooms.
//
// An error carries a Kind, which says what the caller may do about it, and a
// chain of context: the operation, the domain and the object. The room that
// knows the cause chooses the kind; the Image Manager adds operation and
// object once; one gRPC interceptor (package rpcfault) translates kinds to
// status codes. No code compares error texts.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Kind classifies a failure. A Kind is itself an error, so that callers write
// errors.Is(err, fault.NotFound).
type Kind uint8

const (
	// Internal is a broken promise inside Quarry: a bug.
	Internal Kind = iota
	// Invalid means that the request can never succeed as it stands.
	Invalid
	// NotFound means that the object certainly does not exist.
	NotFound
	// Exists means that the name is taken by something different.
	Exists
	// InUse means that the object's users or its state forbid the operation
	// until somebody changes that.
	InUse
	// Pending means that the operation is still running: ask again.
	Pending
	// Conflict means that another writer won: nothing is known to have
	// happened; look again and retry.
	Conflict
	// Exhausted means that space, quota or slots are used up.
	Exhausted
	// OutOfRange means that a size or an index is outside the allowed range.
	OutOfRange
	// Unsupported means that the storage or this build cannot do it at all.
	Unsupported
	// Unavailable means that the storage or a peer cannot be reached now.
	Unavailable
	// Permission means that the storage refused Quarry's credentials, or that
	// the object belongs to somebody else.
	Permission
	// Corrupt means that stored data fails its own checks.
	Corrupt
	// Canceled means that the caller gave up.
	Canceled
	// Deadline means that the time allowed ran out.
	Deadline
)

var kindNames = [...]string{
	"internal error", "invalid", "not found", "already exists", "in use", "pending",
	"conflict", "resource exhausted", "out of range", "unsupported", "unavailable", "permission denied",
	"corrupt", "canceled", "deadline exceeded",
}

// String names the kind in words.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Error is a failure with its kind and its place.
type Error struct {
	Kind Kind
	// Op is what was attempted, in the user's words ("create volume"). May be empty.
	Op string
	// Domain is the ID of the domain concerned. May be empty.
	Domain string
	// Object is the image, slab or tag concerned. May be empty.
	Object string
	// Err is the cause. Never nil in an Error made by this package.
	Err error
}

// New makes an error of a kind. The text says what is wrong, with the field,
// the value and what is allowed; %w wraps a cause.
func New(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

// Wrap gives err a kind. It returns nil for a nil err.
func Wrap(kind Kind, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Err: err}
}

// In adds operation, domain and object to err, keeping its kind; empty
// strings add nothing. What an inner room already said is not said twice. It
// returns nil for a nil err.
func In(err error, op, domain, object string) error {
	if err == nil {
		return nil
	}
	if f, ok := err.(*Error); ok { // only the outermost layer is completed
		c := *f
		fill(&c.Op, op)
		fill(&c.Domain, domain)
		fill(&c.Object, object)
		return &c
	}
	return &Error{Kind: KindOf(err), Op: op, Domain: domain, Object: object, Err: err}
}

func fill(s *string, with string) {
	if *s == "" {
		*s = with
	}
}

// Error renders "op object in domain: cause".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Object != "" {
		sep(&b, " ")
		b.WriteString(e.Object)
	}
	if e.Domain != "" {
		sep(&b, " ")
		b.WriteString("in domain " + e.Domain)
	}
	if e.Err != nil {
		sep(&b, ": ")
		b.WriteString(e.Err.Error())
	} else {
		sep(&b, ": ")
		b.WriteString(e.Kind.String())
	}
	return b.String()
}

func sep(b *strings.Builder, s string) {
	if b.Len() > 0 {
		b.WriteString(s)
	}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's Kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// KindOf finds the kind of err: that of the outermost Error or Kind in its
// chain; Canceled or Deadline for context errors; Internal otherwise. It must
// not be called with nil.
func KindOf(err error) Kind {
	var f *Error
	if errors.As(err, &f) {
		return f.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	}
	return Internal
}
