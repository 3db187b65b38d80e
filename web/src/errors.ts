/** Names of the errors that this package raises on purpose; they are those of the Python package. */
export type PqmErrorName =
  | "NotAPqmFileError"
  | "TruncatedFileError"
  | "DamagedFileError"
  | "UnsupportedFileError"
  | "TokenCheckError"
  | "ModelMismatchError"
  | "ModelError"
  | "LimitError";

/** An error whose message is one line that names the cause, and not the file: the caller knows which one it was. */
export class PqmError extends Error {
  constructor(name: PqmErrorName, message: string) {
    super(message);
    this.name = name;
  }
}
